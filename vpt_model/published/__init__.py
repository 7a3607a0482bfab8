"""The authors' procedure, literally, with its recordings and `verify`, lives here, the oracle of all else; it may
import engine, network, checkpoint, text, config and vpt_kernels.

`procedure` and `encoders` import nothing of engine, network and vpt_kernels: what they are compared with.
"""
