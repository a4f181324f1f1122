"""What `label` is made of: the worklist, its journal and file, votes, the estimate, and the provider's batches."""
