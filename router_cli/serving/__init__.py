"""Answering over HTTP: what `router serve` is made of. Who decides is handed in; nothing here knows a model."""
