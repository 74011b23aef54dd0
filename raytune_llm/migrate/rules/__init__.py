"""What several arguments of LLaMA-Factory become together.

A parameter is the argument of that name, with its default where the file does not say it; beside these there are

    world_size      GPUs that the run had, or null
    dataset_info    the dataset_info.json to take, or null for the one in dataset_dir
    find            path -> where that file is, as it can be written into an experiment, or none

Each rule gives settings, or says why its arguments have no effect, or raises Refusal.
"""
