"""Here so that this folder is on the import path: tests of every folder use `trt_wheels`."""
