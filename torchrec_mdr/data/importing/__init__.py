"""Users' own tables become prepared data."""
