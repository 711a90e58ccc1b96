"""Exchange with other programs: drafters others have trained, and engines that other people run."""
