"""Programs for a clone, which no wheel has."""
