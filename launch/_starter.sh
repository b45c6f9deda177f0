# shellcheck shell=bash disable=SC2034 # sourced by the starters, which use what is set here

split_at_dashes() { # OPTIONS … [-- SCRIPT ARGUMENTS …] into the arrays options and script
    options=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    script=("${@:2}")
    [ ${#script[@]} -gt 0 ] || script=(launch/examples/train.py --deepspeed_config configs/zero1.json)
}

refuse() {
    echo "$0: $*" >&2
    exit 2
}
