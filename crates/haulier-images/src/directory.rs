//! Images from a directory, and into one.

use std::path::Path;

use haulier_transport::channel::Channel;
use haulier_transport::wait::Wait;

use crate::account::Account;
use crate::bank::KnownPages;
pub use crate::error::ImagesError;
use crate::{outgoing, receiver};

/// What went over the connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImageCount {
    /// Number of images.
    pub images: u32,
    /// Their bytes.
    pub bytes: u64,
    /// Pages that were sent ahead.
    pub bank_pages: u64,
    /// Those of them that no image needed in the end.
    pub bank_unused: u64,
    /// Pages of images that were not sent with them, because they had been sent ahead.
    pub referenced: u64,
}

/// Sends every image (`*.img`) of a directory whole, and that there are no more.
/// [`crate::sender::ImageSender`] is for those that send pages ahead.
///
/// # Errors
/// See [`ImagesError`].
pub fn send(
    directory: &Path,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageCount, ImagesError> {
    outgoing::send_all(directory, &mut KnownPages::default(), channel, wait)
}

/// Receives pages sent ahead, then images into an empty directory, until the peer says that there
/// are no more. Names, sizes, order and contents are checked; images and pages sent ahead take at
/// most `limit` bytes together. Pages sent ahead are freed at the end.
///
/// # Errors
/// See [`ImagesError`]; some images may have been written.
pub fn receive(
    directory: &Path,
    limit: u64,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageCount, ImagesError> {
    receiver::receive(directory, &Account::new(limit), channel, wait)
}

/// [`receive`] with an account for a limit, which others can watch or share. In the end the bytes
/// of the images stay charged, for they are in the directory.
///
/// # Errors
/// See [`ImagesError`]; some images may have been written.
pub fn receive_into_account(
    directory: &Path,
    account: &Account,
    channel: &mut Channel,
    wait: &Wait,
) -> Result<ImageCount, ImagesError> {
    receiver::receive(directory, account, channel, wait)
}

#[cfg(test)]
mod tests;
