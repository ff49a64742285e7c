"""Fast paths of the quantizer, one module for each kind of device.

Each makes the codes that `turboquant.quantizer` defines, and reads them.
"""
