"""The verb `export`: a trained run as ONNX, as a torch.export program, as safetensors, and in MLflow's registry."""
