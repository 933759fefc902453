//! nf_tables batches: tables, chains and rules as small Rust calls.
//!
//! A rule is a list of expressions that load into registers, compare and act. Register 1 is the
//! 16-byte scratch register; concatenations use the 4-byte registers from 8 on.

use rustix::io::Errno;

use crate::netlink::{ACK, APPEND, CREATE, Messages, Socket};

const SUBSYSTEM: u16 = 10;
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const DELRULE: u16 = 8;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const DELSETELEM: u16 = 14;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// `NFPROTO_INET`: IPv4 and IPv6 in one table.
const INET: u8 = 1;

/// 16-byte register that most rules use.
const REG: u32 = 1;
/// The verdict register.
const REG_VERDICT: u32 = 0;
/// First 4-byte register.
const REG32: u32 = 8;

/// Where in a packet's way a chain hangs.
#[derive(Clone, Copy)]
pub(crate) enum Hook {
    Prerouting = 0,
    Output = 3,
    Postrouting = 4,
}

/// What ends a rule.
#[derive(Clone, Copy)]
pub(crate) enum Verdict<'a> {
    Drop,
    Accept,
    Jump(&'a str),
    Goto(&'a str),
}

impl Verdict<'_> {
    fn code(self) -> i32 {
        match self {
            Self::Drop => 0,
            Self::Accept => 1,
            Self::Jump(_) => -3,
            Self::Goto(_) => -4,
        }
    }

    fn put(self, data: &mut Messages) {
        data.nest(2, |verdict| {
            verdict.bytes(1, &self.code().to_be_bytes());
            if let Self::Jump(chain) | Self::Goto(chain) = self {
                verdict.text(2, chain);
            }
        });
    }
}

/// Changes that take effect together or not at all.
pub(crate) struct Batch {
    messages: Messages,
    table: &'static str,
}

impl Batch {
    pub(crate) fn new(table: &'static str) -> Self {
        let mut batch = Self { messages: Messages::new(), table };
        batch.messages.message(BATCH_BEGIN, 0, &[0, 0, 0, 10]);
        batch
    }

    fn message(&mut self, kind: u16, flags: u16) -> &mut Messages {
        self.messages.message((SUBSYSTEM << 8) | kind, flags, &[INET, 0, 0, 0])
    }

    /// Bytes so far: a batch must fit one write.
    pub(crate) fn len(&self) -> usize {
        self.messages.len()
    }

    /// Makes the table if it is not there.
    pub(crate) fn table(&mut self) -> &mut Self {
        let table = self.table;
        self.message(NEWTABLE, CREATE).text(1, table);
        self
    }

    /// Removes the table with all in it; it must exist.
    pub(crate) fn delete_table(&mut self) -> &mut Self {
        let table = self.table;
        self.message(DELTABLE, 0).text(1, table);
        self
    }

    /// A chain called by others.
    pub(crate) fn chain(&mut self, name: &str) -> &mut Self {
        let table = self.table;
        self.message(NEWCHAIN, CREATE).text(1, table).text(3, name);
        self
    }

    /// A chain the kernel calls.
    pub(crate) fn hooked_chain(&mut self, name: &str, kind: &str, hook: Hook, priority: i32) -> &mut Self {
        let table = self.table;
        self.message(NEWCHAIN, CREATE)
            .text(1, table)
            .text(3, name)
            .nest(4, |into| {
                into.big(1, hook as u32).bytes(2, &priority.to_be_bytes());
            })
            .text(7, kind);
        self
    }

    /// Removes an empty chain that nobody calls.
    pub(crate) fn delete_chain(&mut self, name: &str) -> &mut Self {
        let table = self.table;
        self.message(DELCHAIN, 0).text(1, table).text(3, name);
        self
    }

    /// Empties a chain.
    pub(crate) fn flush(&mut self, chain: &str) -> &mut Self {
        let table = self.table;
        self.message(DELRULE, 0).text(1, table).text(2, chain);
        self
    }

    /// Appends a rule.
    pub(crate) fn rule(&mut self, chain: &str, fill: impl FnOnce(&mut Rule<'_>)) -> &mut Self {
        let table = self.table;
        self.message(NEWRULE, CREATE | APPEND).text(1, table).text(2, chain).nest(4, |list| fill(&mut Rule { list }));
        self
    }

    /// A hash map from `key_bytes` to verdicts. `id` names it within the batch.
    pub(crate) fn verdict_map(&mut self, name: &str, id: u32, key_bytes: u32) -> &mut Self {
        const FLAG_MAP: u32 = 8;
        const DATA_VERDICT: u32 = 0xffff_ff00;
        let table = self.table;
        self.message(NEWSET, CREATE)
            .text(1, table)
            .text(2, name)
            .big(3, FLAG_MAP)
            .big(4, 0)
            .big(5, key_bytes)
            .big(6, DATA_VERDICT)
            .big(7, 0)
            .big(10, id);
        self
    }

    /// Adds an entry.
    pub(crate) fn add_element(&mut self, map: &str, key: &[u8], verdict: Verdict<'_>) -> &mut Self {
        self.element(NEWSETELEM, CREATE, map, key, Some(verdict))
    }

    /// Removes an entry; it must exist.
    pub(crate) fn delete_element(&mut self, map: &str, key: &[u8]) -> &mut Self {
        self.element(DELSETELEM, 0, map, key, None)
    }

    fn element(&mut self, kind: u16, flags: u16, map: &str, key: &[u8], verdict: Option<Verdict<'_>>) -> &mut Self {
        let table = self.table;
        self.message(kind, flags).text(1, table).text(2, map).nest(3, |list| {
            list.nest(1, |element| {
                element.nest(1, |data| {
                    data.bytes(1, key);
                });
                if let Some(verdict) = verdict {
                    element.nest(2, |data| verdict.put(data));
                }
            });
        });
        self
    }

    /// Hands the batch to the kernel. On error nothing of it was done.
    pub(crate) fn commit(mut self, socket: &Socket) -> Result<(), Errno> {
        // The table exists by now; asking for it once more is the message that is acknowledged.
        let table = self.table;
        self.message(NEWTABLE, CREATE | ACK).text(1, table);
        let last = self.messages.sequence();
        self.messages.message(BATCH_END, 0, &[0, 0, 0, 10]);
        socket.commit(&mut self.messages, last)
    }

    /// Like [`Self::commit`] for a batch that ends by removing its table.
    pub(crate) fn commit_removal(mut self, socket: &Socket) -> Result<(), Errno> {
        let table = self.table;
        self.message(NEWTABLE, CREATE).text(1, table);
        self.message(DELTABLE, ACK).text(1, table);
        let last = self.messages.sequence();
        self.messages.message(BATCH_END, 0, &[0, 0, 0, 10]);
        socket.commit(&mut self.messages, last)
    }
}

/// Expressions of one rule, in order.
pub(crate) struct Rule<'a> {
    list: &'a mut Messages,
}

impl Rule<'_> {
    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Messages)) -> &mut Self {
        self.list.nest(1, |element| {
            element.text(1, name).nest(2, fill);
        });
        self
    }

    fn meta(&mut self, key: u32, register: u32) -> &mut Self {
        self.expression("meta", |data| {
            data.big(1, register).big(2, key);
        })
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) -> &mut Self {
        self.expression("payload", |data| {
            data.big(1, register).big(2, base).big(3, offset).big(4, length);
        })
    }

    fn compare(&mut self, equal: bool, value: &[u8]) -> &mut Self {
        self.expression("cmp", |data| {
            data.big(1, REG).big(2, u32::from(!equal)).nest(3, |operand| {
                operand.bytes(1, value);
            });
        })
    }

    /// The socket mark of the sender.
    pub(crate) fn mark(&mut self, mark: u32) -> &mut Self {
        self.meta(3, REG).compare(true, &mark.to_ne_bytes())
    }

    /// Arrived on this interface.
    pub(crate) fn arriving_by(&mut self, index: u32) -> &mut Self {
        self.meta(4, REG).compare(true, &index.to_ne_bytes())
    }

    /// Leaves by this interface.
    pub(crate) fn leaving_by(&mut self, index: u32) -> &mut Self {
        self.meta(5, REG).compare(true, &index.to_ne_bytes())
    }

    /// IPv4 or IPv6.
    pub(crate) fn family(&mut self, v6: bool) -> &mut Self {
        self.meta(15, REG).compare(true, &[if v6 { 10 } else { 2 }])
    }

    /// Transport protocol: 6 TCP, 17 UDP, 1 ICMP, 58 `ICMPv6`.
    pub(crate) fn protocol(&mut self, protocol: u8) -> &mut Self {
        self.meta(16, REG).compare(true, &[protocol])
    }

    /// Transport destination port; after [`Self::protocol`].
    pub(crate) fn port(&mut self, port: u16) -> &mut Self {
        self.payload(2, 2, 2, REG).compare(true, &port.to_be_bytes())
    }

    /// First byte of the transport header (ICMP type).
    pub(crate) fn first_byte(&mut self, value: u8) -> &mut Self {
        self.payload(2, 0, 1, REG).compare(true, &[value])
    }

    /// Destination address inside (or outside of) a range; after [`Self::family`].
    pub(crate) fn destined(&mut self, net: std::net::IpAddr, length: u8, inside: bool) -> &mut Self {
        let (offset, bytes, mask) = match net {
            std::net::IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
                (16, v4.octets().to_vec(), mask.to_be_bytes().to_vec())
            }
            std::net::IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
                (24, v6.octets().to_vec(), mask.to_be_bytes().to_vec())
            }
        };
        self.address_in(offset, &bytes, &mask, inside)
    }

    /// Source address; after [`Self::family`].
    pub(crate) fn sent_from(&mut self, address: std::net::IpAddr) -> &mut Self {
        match address {
            std::net::IpAddr::V4(v4) => self.payload(1, 12, 4, REG).compare(true, &v4.octets()),
            std::net::IpAddr::V6(v6) => self.payload(1, 8, 16, REG).compare(true, &v6.octets()),
        }
    }

    fn address_in(&mut self, offset: u32, net: &[u8], mask: &[u8], inside: bool) -> &mut Self {
        let length = u32::try_from(net.len()).expect("4 or 16");
        let masked: Vec<u8> = net.iter().zip(mask).map(|(byte, mask)| byte & mask).collect();
        self.payload(1, offset, length, REG);
        self.expression("bitwise", |data| {
            data.big(1, REG).big(2, REG).big(3, length);
            data.nest(4, |operand| {
                operand.bytes(1, mask);
            });
            data.nest(5, |operand| {
                operand.bytes(1, &vec![0; mask.len()]);
            });
        });
        self.compare(inside, &masked)
    }

    /// Looks destination address, protocol and port up in a verdict map and obeys what it finds.
    pub(crate) fn service_lookup(&mut self, v6: bool, map: &str) -> &mut Self {
        let (offset, length) = if v6 { (24, 16) } else { (16, 4) };
        self.payload(1, offset, length, REG32);
        self.meta(16, REG32 + length / 4);
        self.payload(2, 2, 2, REG32 + length / 4 + 1);
        self.expression("lookup", |data| {
            data.text(1, map).big(2, REG32).big(3, REG_VERDICT);
        })
    }

    /// Looks source and destination address up in a verdict map and obeys what it finds.
    pub(crate) fn pair_lookup(&mut self, v6: bool, map: &str) -> &mut Self {
        let (offset, length) = if v6 { (8, 32) } else { (12, 8) };
        self.payload(1, offset, length, REG32);
        self.expression("lookup", |data| {
            data.text(1, map).big(2, REG32).big(3, REG_VERDICT);
        })
    }

    /// Matches one packet in `n`, at random.
    pub(crate) fn one_in(&mut self, n: u32) -> &mut Self {
        self.expression("numgen", |data| {
            data.big(1, REG).big(2, n).big(3, 1).big(4, 0);
        })
        .compare(true, &0_u32.to_ne_bytes())
    }

    fn immediate(&mut self, register: u32, value: &[u8]) -> &mut Self {
        self.expression("immediate", |data| {
            data.big(1, register).nest(2, |operand| {
                operand.bytes(1, value);
            });
        })
    }

    /// Rewrites the destination to this machine's `port`: loopback on output, the interface's own address on prerouting.
    pub(crate) fn redirect(&mut self, port: u16) -> &mut Self {
        self.immediate(2, &port.to_be_bytes());
        self.expression("redir", |data| {
            data.big(1, 2);
        })
    }

    /// Rewrites the destination.
    pub(crate) fn destination(&mut self, to: std::net::SocketAddr) -> &mut Self {
        let (family, bytes) = match to.ip() {
            std::net::IpAddr::V4(v4) => (2, v4.octets().to_vec()),
            std::net::IpAddr::V6(v6) => (10, v6.octets().to_vec()),
        };
        self.immediate(1, &bytes).immediate(2, &to.port().to_be_bytes());
        self.expression("nat", |data| {
            data.big(1, 1).big(2, family).big(3, 1).big(5, 2);
        })
    }

    /// Rewrites the source to the address of the interface it leaves by.
    pub(crate) fn masquerade(&mut self) -> &mut Self {
        self.expression("masq", |_| {})
    }

    /// Answers TCP with a reset.
    pub(crate) fn reset(&mut self) -> &mut Self {
        self.expression("reject", |data| {
            data.big(1, 1);
        })
    }

    /// Answers "port unreachable" in the packet's family.
    pub(crate) fn unreachable(&mut self) -> &mut Self {
        self.expression("reject", |data| {
            data.big(1, 2).bytes(2, &[1]);
        })
    }

    /// Ends the rule.
    pub(crate) fn verdict(&mut self, verdict: Verdict<'_>) -> &mut Self {
        self.expression("immediate", |data| {
            data.big(1, REG_VERDICT).nest(2, |operand| verdict.put(operand));
        })
    }
}
