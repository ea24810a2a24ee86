"""One self-contained page about runs, which opens from the disk without a network."""
