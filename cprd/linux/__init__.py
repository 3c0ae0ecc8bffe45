"""The only door to the kernel: descriptors, processes, limits, standard streams."""
