"""A whole state packed into one descriptor: layout, packing, reading, looking inside."""
