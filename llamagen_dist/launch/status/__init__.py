"""The state of run directories, sweeps and pipelines, from their files and one question to SLURM."""
