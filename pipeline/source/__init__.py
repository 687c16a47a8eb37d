"""Source datasets: what is listed, read and decoded."""
