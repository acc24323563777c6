//! Faults that are no crash: disks and memory that are full, a target that is wanted twice, a migration
//! that comes twice, and peers that lie. Whatever happens, exactly one copy lives, its client notices
//! nothing, and nothing is left over.

mod other;
mod script;
mod stage;
