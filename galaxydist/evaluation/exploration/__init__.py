"""What the page of `galaxydist data explore` shows: a sample of pictures looked at once, and what is known of all galaxies."""
