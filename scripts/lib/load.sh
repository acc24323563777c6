# Loads the other files here. The script that sources this has set haulier_root.
# shellcheck shell=bash

# shellcheck source=scripts/lib/say.sh
. "${haulier_root:?}/scripts/lib/say.sh"
# shellcheck source=scripts/lib/version.sh
. "${haulier_root:?}/scripts/lib/version.sh"
# shellcheck source=scripts/lib/apt.sh
. "${haulier_root:?}/scripts/lib/apt.sh"
# shellcheck source=scripts/lib/machine.sh
. "${haulier_root:?}/scripts/lib/machine.sh"
# shellcheck source=scripts/lib/rust.sh
. "${haulier_root:?}/scripts/lib/rust.sh"
# shellcheck source=scripts/lib/criu.sh
. "${haulier_root:?}/scripts/lib/criu.sh"
