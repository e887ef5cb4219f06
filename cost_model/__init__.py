"""Hardware to seconds and bytes: knows nothing of fx, of the passes or of torch.distributed."""
