"""`fastres bench MODEL`: checks a converted ResNet against the original, then times both.

One file, one job, in the order in which a run uses them:

    options.py      what the user asked for, checked before anything heavy is imported
    data.py         photographs -> one normalised batch
    models.py       torchvision models, checkpoints, running statistics
    truth.py        the float64 answers, and the file that carries batch and model to the workers
    variants.py     the list of things to time, and the environment each needs
    worker.py       one process per variant; JSON lines over its stdin and stdout
    engines.py      what a worker runs: torch eager, torch.compile, fastres, ONNX Runtime, OpenVINO
    saved.py        bytes that a forward pass saves for backward
    verify.py       errors against float64, and the rule they must pass
    machine.py      copy bandwidth, matrix product rate, and the roofline they imply
    runner.py       starts workers, interleaves them round by round
    stats.py        medians and per-round ratios
    environment.py  the machine and the versions, for the record
    progress.py     the bar, or log lines
    report.py       table, JSON
    chart.py        PNG
    main.py         the run, from options to exit code
"""
