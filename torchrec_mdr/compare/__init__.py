"""Runs a grid of methods, backbones, divisions and seeds, and compares what they gave, over seeds.

    python -m torchrec_mdr.compare --config grid.yaml --output_dir DIR

Every combination is one training process. Runs whose methods start from a pretrained backbone share it. What is
finished is not run again, what was interrupted is continued. After every run results.csv, domains.csv, results.md and
report.html are written anew.
"""
