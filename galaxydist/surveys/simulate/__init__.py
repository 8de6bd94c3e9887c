"""The simulated survey: galaxies of ten classes drawn in the schema of Galaxy10 DECaLS."""
