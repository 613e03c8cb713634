"""Training a backbone, distilling its exits."""
