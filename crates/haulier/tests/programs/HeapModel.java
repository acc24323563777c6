import java.io.RandomAccessFile;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;

/**
 * A heap of 256 MiB that is rewritten and checked all the time.
 *
 * <p>Every block's contents follow from its number and the round that wrote it last; which block a
 * round writes follows from the round's number. So the whole heap follows from how many rounds there
 * were, and is checked against that: at each visit a block, and in the end every byte.
 *
 * <p>In folder args[0] it writes numbered lines to "status": "ready 1" when the heap is filled, then
 * "wait" several times a second until "go-1" exists, then "good 1", "ready 2" and so on, or
 * "wrong: ..." and its end. When "end" exists, "done".
 */
public final class HeapModel {
    private static final int BLOCKS = 4096;
    private static final int WORDS = 8192; // 64 KiB a block

    private final long[][] blocks = new long[BLOCKS][];
    private final long[] writtenIn = new long[BLOCKS];
    private final RandomAccessFile status;
    private final Path folder;
    private long round;
    private int line;

    private HeapModel(Path folder) throws Exception {
        this.folder = folder;
        status = new RandomAccessFile(folder.resolve("status").toFile(), "rw");
    }

    public static void main(String[] args) throws Exception {
        HeapModel model = new HeapModel(Path.of(args[0]));
        try {
            model.run();
        } catch (Throwable error) {
            model.say("wrong: " + error);
            System.exit(1);
        }
    }

    private void run() throws Exception {
        for (int block = 0; block < BLOCKS; block++) {
            blocks[block] = contents(block, 0);
        }
        for (int turn = 1; ; turn++) {
            say("ready " + turn);
            while (!exists("go-" + turn)) {
                if (exists("end")) {
                    say("done");
                    return;
                }
                for (int i = 0; i < 50; i++) {
                    rewriteOne();
                }
                Thread.sleep(20);
                say("wait");
            }
            checkAll();
            say("good " + turn);
        }
    }

    private void rewriteOne() {
        round++;
        int block = blockOf(round);
        check(block, writtenIn[block]);
        writtenIn[block] = round;
        if (round % 4 == 0) {
            // The collector has something to move and to free.
            blocks[block] = contents(block, round);
        } else {
            fill(blocks[block], block, round);
        }
    }

    /** Against a history worked out anew: the one in memory could be wrong along with the blocks. */
    private void checkAll() {
        long[] expected = new long[BLOCKS];
        for (long past = 1; past <= round; past++) {
            expected[blockOf(past)] = past;
        }
        for (int block = 0; block < BLOCKS; block++) {
            check(block, expected[block]);
        }
    }

    private void check(int block, long written) {
        long[] words = blocks[block];
        for (int word = 0; word < WORDS; word++) {
            if (words[word] != mixed(block, written, word)) {
                throw new AssertionError("block " + block + " of round " + written + ", word " + word);
            }
        }
    }

    private static long[] contents(int block, long round) {
        long[] words = new long[WORDS];
        fill(words, block, round);
        return words;
    }

    private static void fill(long[] words, int block, long round) {
        for (int word = 0; word < WORDS; word++) {
            words[word] = mixed(block, round, word);
        }
    }

    private static int blockOf(long round) {
        return (int) Long.remainderUnsigned(mixed(-1, round, 0), BLOCKS);
    }

    /** splitmix64: neighbours have nothing in common. */
    private static long mixed(long block, long round, long word) {
        long z = (block << 48) + (round << 16) + (word + 1) * 0x9e3779b97f4a7c15L;
        z = (z ^ (z >>> 30)) * 0xbf58476d1ce4e5b9L;
        z = (z ^ (z >>> 27)) * 0x94d049bb133111ebL;
        return z ^ (z >>> 31);
    }

    private boolean exists(String name) {
        return Files.exists(folder.resolve(name));
    }

    private void say(String text) throws Exception {
        line++;
        status.write((line + " " + text + "\n").getBytes(StandardCharsets.UTF_8));
    }
}
