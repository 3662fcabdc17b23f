"""The exercises of docs/exercises.md: what a solution must compute, and on which inputs."""
