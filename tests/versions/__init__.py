"""The product with other releases of DeepSpeed: `./tests/run.sh --versions`."""
