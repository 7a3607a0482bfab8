"""What a person sees lives here, the command line, the demo and its drawings; it may import mini, published, engine,
network, checkpoint, text, config and vpt_kernels."""
