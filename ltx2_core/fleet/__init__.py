"""Several devices for one clip: an engine of worker processes with the interface of the one in this process."""
