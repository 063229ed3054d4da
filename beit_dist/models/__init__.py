"""The BEiT backbone and its masked-image-modelling head."""
