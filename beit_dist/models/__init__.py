"""The networks: the BEiT backbone and its head, the dVAE, and how much arithmetic they are."""
