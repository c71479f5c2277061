"""`python -m tl_neuron_circuits.cli`: the same as `tl-neuron-circuits`."""

from . import main

if __name__ == "__main__":
    main()
