"""What `router train` is made of, beside its own file: lessons, the loop around TRL's trainer, what a run leaves."""
