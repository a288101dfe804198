"""Folders of files that are whole or not there. Knows files and ranks; of models, only how `export` names their weights."""
