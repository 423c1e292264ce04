"""One video on several devices: what is split between ranks, and how they talk."""
