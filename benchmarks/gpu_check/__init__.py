"""Does the GPU path do what it should, and how fast? Everything about one lent machine, in the minutes there are."""
