"""How good a router is: metrics, the baselines it must beat, and the report that says both."""
