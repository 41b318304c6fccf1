"""Grammars that requests may name: files with versions, each tested before it is used."""
