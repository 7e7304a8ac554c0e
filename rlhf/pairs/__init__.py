"""Makes preference pairs: from drawn scenes, from a model that sees less of a picture, from a tree search."""
