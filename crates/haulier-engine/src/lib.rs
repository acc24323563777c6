//! Source and destination state machines of the hand-over. No IO, no clock.
//!
//! The hand-over moves the right to run from one host to the other. One decision is made, once,
//! and recorded on the destination's disk; everything else follows from it:
//!
//! * the source never thaws once it has sent its commit, unless the destination says "refused";
//! * the destination never thaws before its journal says "committed", and never after it says
//!   "refused";
//! * the source keeps the frozen tasks until it hears "complete".
//!
//! So there are never two that can run, and never none. `tests/model.rs` explores both machines, the
//! network between them and the recovery of each with a model checker. A machine takes an [`Event`] and returns
//! the [`Action`]s to perform, in order; a failure to perform one is fed back as an event. The
//! shell around it owns sockets, CRIU and clocks.
//!
//! [`recovery`] is what the records of a hand-over mean after its agent was killed. Beside the
//! hand-over, [`convergence`] is the rule that ends the rounds of pre-copy.
//!
//! [`Event`]: source::Event
//! [`Action`]: source::Action

pub mod convergence;
pub mod destination;
pub mod journal;
pub mod phase;
pub mod recovery;
pub mod source;
