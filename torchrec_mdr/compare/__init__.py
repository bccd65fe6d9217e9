"""Runs a grid of methods, backbones, divisions and seeds, and compares what they gave, over seeds.

    python -m torchrec_mdr.compare --config grid.yaml --output_dir DIR --parallel 2

Every combination is one training process. Runs whose methods start from a pretrained backbone share it. What is
finished is not run again, what was interrupted is continued. After every run results.csv, domains.csv, results.md and
report.html are written anew.

With --scheduler, runs are jobs of a scheduler that TorchX knows; DIR and the data cache ($MDR_CACHE) have to lie where
the jobs find them, on a file system that they share, DIR also in an object store; an image of theirs has to hold this
package:

    ... --scheduler slurm --scheduler_args partition=p,time=60 --component_args '-j 1x2 --gpu 2'
"""
