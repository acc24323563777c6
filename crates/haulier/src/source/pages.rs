//! Sending the skeleton and the pages.

use std::error::Error;
use std::path::Path;
use std::thread;

use haulier_criu::skeleton::Skeleton;
use haulier_images::directory;
use haulier_memory::page::PageRange;
use haulier_memory::stream::{self, TaskPages};
use haulier_proto::message::Role;
use haulier_transport::channel::Channel;
use haulier_transport::error::TransportError;
use haulier_transport::wait::Wait;

use super::link::Dialer;
use crate::report::Sent;

type AnyError = Box<dyn Error + Send + Sync>;

/// The connections that carry the target.
#[derive(Debug)]
pub(crate) struct Streams {
    images: Channel,
    memory: Vec<Channel>,
}

impl Streams {
    /// Opens them: before the freeze, so that no handshake falls into it.
    pub(crate) fn open(
        dialer: &Dialer,
        memory: u32,
        wait: &Wait,
    ) -> Result<Streams, TransportError> {
        let (images, _) = dialer.open(Role::Images, 0, wait)?;
        let memory = (0..memory)
            .map(|index| Ok(dialer.open(Role::Memory, index, wait)?.0))
            .collect::<Result<_, TransportError>>()?;
        Ok(Streams { images, memory })
    }

    /// Sends the images in `directory`, and at the same time the pages that they leave out, read
    /// from the frozen tasks.
    pub(crate) fn send(
        mut self,
        directory: &Path,
        skeleton: &Skeleton,
        wait: &Wait,
    ) -> Result<Sent, AnyError> {
        let tasks = skeleton.tasks.iter().map(task_pages).collect();
        let (images, memory) = thread::scope(|scope| {
            let images = scope.spawn(|| directory::send(directory, &mut self.images, wait));
            let memory = stream::send_pages(self.memory, tasks, wait);
            (images.join(), memory)
        });
        let images = images.map_err(|_| "the sender of images panicked")??;
        let memory = memory?;
        Ok(Sent {
            images: images.images,
            image_bytes: images.bytes,
            pages: memory.pages,
            zero_pages: memory.zero_pages,
            memory_wire_bytes: memory.bytes_on_wire,
        })
    }
}

fn task_pages(task: &haulier_criu::skeleton::Task) -> TaskPages {
    TaskPages {
        pid: task.pid as i32,
        task: task.pid,
        ranges: task
            .lazy
            .iter()
            .map(|range| PageRange {
                start: range.start,
                pages: range.pages,
            })
            .collect(),
    }
}
