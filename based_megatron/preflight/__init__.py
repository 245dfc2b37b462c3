"""What a run will need and take, from its config alone: memory of each rank, time, disk, and a layout that fits."""
