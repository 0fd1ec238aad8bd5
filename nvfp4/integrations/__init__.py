"""NVFP4 inside other people's trainers; each file needs one of their packages, and no other file.

    transformers   from_pretrained(..., quantization_config=NVFP4TrainingConfig("quartet2"))
    trainer        Trainer(..., callbacks=[NoiseCallback()])        resuming to the last bit
    trl            NVFP4GRPOTrainer(model=nvfp4.convert(model, "rl"), ...)
    lightning      Fabric(plugins=NVFP4Precision("search_eden", device="cuda"))

A converted model is an ordinary one: same parameters, same ``state_dict``. So most trainers need
nothing of this; what is here closes the gaps that are left.
"""
