"""What goes on in run directories, sweeps and pipelines, told from their files and one question to SLURM."""
