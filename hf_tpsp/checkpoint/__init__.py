"""Folders of files that are whole or not there. Knows files and ranks, and nothing of models."""
