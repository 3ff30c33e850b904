"""The backend "triton", with a file or folder for each kernel. Importing this package alone does not load Triton."""
