"""`router` learns which formation of LLM agents a coding task needs.

The package does nothing when imported; see `router_cli.api` for use from Python.
"""

__version__ = "0.1.0"
