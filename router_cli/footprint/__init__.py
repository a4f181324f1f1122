"""The estimate of what a training run takes: memory, time and money, from the model's configuration alone."""
