"""One file for each library above transformers, each usable without the others."""
