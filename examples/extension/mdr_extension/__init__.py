"""A package that extends torchrec_mdr by entry points."""
