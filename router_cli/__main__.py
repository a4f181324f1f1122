"""`python -m router_cli` is `router`."""

from router_cli.cli import entry

if __name__ == "__main__":
    entry()
