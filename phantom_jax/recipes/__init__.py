"""The published recipes of both families, by size. The files of configs/ name one size each."""
